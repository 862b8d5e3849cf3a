"""Public API: one file per resource. A request is decoded, passed to one use case, and its result encoded."""
