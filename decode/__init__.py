"""The decode pool: takes sequences whose KV arrives and gives each its next tokens."""
