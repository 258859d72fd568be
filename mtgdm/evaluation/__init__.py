"""A student asked and judged: a model in this process, in vLLM or behind a server, all by the same ruler."""
