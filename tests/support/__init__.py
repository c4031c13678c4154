"""What tests share: real servers as processes of their own, contracts, a line that can be cut."""
