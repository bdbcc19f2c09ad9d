"""What golden files and vectors are made from: fixed keys, ids and words."""

MASTER, KEY, PASSPHRASE = bytes(range(32)), bytes(range(100, 132)), "correct horse battery staple"
SESSION_ID, OTHER_ID = bytes(range(200, 216)), bytes(16)
MODEL, OTHER_MODEL = "a golden model", "another model"
TOKENS, WINDOW, SAVES = 5, 4, 2
