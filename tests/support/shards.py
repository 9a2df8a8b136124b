"""Fixtures of the tests."""
