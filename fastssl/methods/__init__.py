"""Self-supervised methods. A method knows networks, heads and losses; it knows no files and no command line."""

from fastssl.methods.base import Method
from fastssl.methods.dino import DINO, DINOConfig
from fastssl.methods.distill import Distill, DistillConfig
from fastssl.methods.empssl import EMPSSL, EMPSSLConfig
from fastssl.methods.moco import MoCo, MoCoConfig
from fastssl.methods.resa import ReSA, ReSAConfig
from fastssl.methods.simclr import SimCLR, SimCLRConfig
from fastssl.methods.swav import SwAV, SwAVConfig

#: name in a recipe -> (class, its configuration)
METHODS: dict[str, tuple[type[Method], type]] = {
    "moco": (MoCo, MoCoConfig),
    "dino": (DINO, DINOConfig),
    "swav": (SwAV, SwAVConfig),
    "simclr": (SimCLR, SimCLRConfig),
    "resa": (ReSA, ReSAConfig),
    "empssl": (EMPSSL, EMPSSLConfig),
    "distill": (Distill, DistillConfig),
}

__all__ = [
    "DINO",
    "EMPSSL",
    "METHODS",
    "DINOConfig",
    "EMPSSLConfig",
    "MoCo",
    "MoCoConfig",
    "ReSA",
    "ReSAConfig",
    "SimCLR",
    "SimCLRConfig",
    "SwAV",
    "SwAVConfig",
]
