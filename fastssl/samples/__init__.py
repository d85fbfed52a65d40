"""Data files only: eighteen panoramas, read by :mod:`fastssl.sample_set`; where they are from stands in LICENSE.txt."""
