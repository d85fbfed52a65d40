"""How good the features are: kNN and linear probes on a frozen backbone, and the raw pixels as a reference."""
