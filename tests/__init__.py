"""Tests, one folder per package. Each test begins with the sentence that it promises."""
