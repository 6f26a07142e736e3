"""One replica: from token ids to token ids. Knows no Ray, no HTTP, no Prometheus."""
