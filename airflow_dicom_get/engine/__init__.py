"""Resolve, plan, retrieve, reconcile: from a query to a verdict."""
