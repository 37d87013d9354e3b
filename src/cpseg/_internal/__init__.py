"""Shared by all packages, promised to nobody: names here may change in any release."""
