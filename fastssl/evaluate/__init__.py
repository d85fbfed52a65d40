"""How good the features are: kNN and linear probes on a frozen backbone, fine-tuning with few labels or on other
photos, and the raw pixels as a reference. The package itself is `fastssl.api.evaluate`: ``fastssl.evaluate(run, ...)``.
"""

import sys

from fastssl.utils.callable_module import CallableModule

sys.modules[__name__].__class__ = CallableModule
