"""The group of ranks as the Driver sees it, and the loop that each rank runs.

`ShardGroup` (base.py) is vLLM's Executor: `InProcessGroup` is UniProcExecutor, `RemoteShardGroup` resembles MultiprocExecutor.
`run_shard` (worker.py) is WorkerProc.
"""
