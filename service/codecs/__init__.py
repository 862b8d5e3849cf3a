"""Bytes to arrays and back: JSON, Arrow, tensors. Independent of connections and SQL."""
