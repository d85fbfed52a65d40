"""How good the features are: kNN and linear probes on a frozen backbone, fine-tuning with few labels or on other
photos, and the raw pixels as a reference.
"""
