"""One model in memory: weights, KV cache, work space, threads, and the plan of their memory."""
