"""Inside engines that are not ours: vLLM and SGLang, unmodified.

Each engine finds its package here by an entry point of this distribution, and calls its `register`.
The modules beside the packages are what the engines have in common. None of them imports an engine.
"""
