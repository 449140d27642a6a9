"""The model room opens a chat model, renders its chats and runs its forward passes.

Only this room imports transformers. `chat.ChatModel` is the way in. Below it are `rendering` (chats
as token ids), `loading` (weights and tokenizers, checked), `generation` (how replies end, and tokens
never said), `fingerprint` (a stored row's key), `tampering` (what no key covers), `architecture`
(all that is special to a model family), `tree` and `forward` (states of rows that share prefixes)
and `steps` (sampling's next token). Above it is `soft_prompt`.
"""
