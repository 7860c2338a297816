"""Thin operators: check, dispatch, done."""
