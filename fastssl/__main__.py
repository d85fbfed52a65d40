"""``python -m fastssl``: what launchers such as torchrun start."""

from fastssl.cli import main

main()
