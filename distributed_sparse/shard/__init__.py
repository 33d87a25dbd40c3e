"""One rank's execution. In vLLM's terms: `Shard` is Worker + GPUModelRunner, `SlotTable` the InputBatch, `SparseAttention` the
attention backend, `DecodeGraphs` the CUDA graph dispatcher."""
