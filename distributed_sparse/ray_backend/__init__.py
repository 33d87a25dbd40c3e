"""All that imports Ray: the ranks as actors, the Driver as an actor, placement, and metrics export.

`RayShardGroup` is vLLM's RayDistributedExecutor, `DriverActor` hosts the EngineCoreProc, `RemoteDriver` is EngineCoreClient.
"""
