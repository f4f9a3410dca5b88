"""What a process needs of the operating system: clock, heartbeats, streams, proxies. Imports stages.contract alone."""
