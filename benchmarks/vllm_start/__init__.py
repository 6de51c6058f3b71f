"""How long vLLM takes from its start to the first token: from its disk, and from a peer."""
