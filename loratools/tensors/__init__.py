"""Bytes on disk: the only package that opens tensor files."""
