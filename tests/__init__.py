"""Promises of every room, each test opened by the sentence that it keeps."""
