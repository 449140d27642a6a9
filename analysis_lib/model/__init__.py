"""The model room: a chat model opened, its chats rendered, its forward passes shared. Only this
room imports transformers.

`chat.ChatModel` is the way in. Below it: `rendering` (chats as token ids), `loading` (weights and
tokenizers, checked), `fingerprint` (what a stored row is keyed by), `architecture` (all that is
special to a model family), `tree` and `forward` (states of rows that share prefixes), `steps`
(sampling's next token). Above it: `soft_prompt`.
"""
