"""Attention that leaves out blocks of keys, by the error that it makes."""
