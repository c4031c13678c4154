"""Parts for trying and testing retrievals: an embedded PACS and the data to put into it."""
