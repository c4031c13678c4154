"""A simulation of whole retrievals: models of disk, bucket, network and time, and what must hold after each history."""
