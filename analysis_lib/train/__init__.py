"""The train room trains safety prompts as soft tokens, and exports them."""
