"""From Redis to the database and back: what a `RedisStorage` writes is mirrored into Django's tables."""
