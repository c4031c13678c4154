"""Where instances go: the sink contract, the filesystem sink and the ledger."""
