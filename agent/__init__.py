"""The agent of a host: the service, the engine that dumps and restores, the streams that move pages."""
