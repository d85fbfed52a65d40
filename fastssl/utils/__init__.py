"""Small tools without an opinion; they import nothing of ours but each other and fastssl.errors."""
