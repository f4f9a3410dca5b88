"""Problems: the nouns that travel, where problems come from, and how a question becomes a prompt."""
