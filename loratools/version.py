"""The version, where anything may read it."""

VERSION = "0.1.0"
