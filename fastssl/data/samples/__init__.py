"""Data files only: eighteen panoramas, read by :mod:`fastssl.data.sample_set`; where they are from stands in
LICENSE.txt.
"""
