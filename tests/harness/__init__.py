"""What the mount tests share: nodes, clusters, data, a watchdog."""
