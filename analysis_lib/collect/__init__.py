"""The collect room captures hidden states and samples responses, and keeps both in the store."""
