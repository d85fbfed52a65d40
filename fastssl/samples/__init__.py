"""Data files only: a slice of Fashion-MNIST, read by :mod:`fastssl.sample_set`; licence in LICENSE-fashion-mnist.txt."""
