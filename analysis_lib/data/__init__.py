"""The data room reads query sets, safety prompts and wrappers: the project's own and a user's."""
