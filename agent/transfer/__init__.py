"""The stream process: one SSH connection between two agents, which carries pages, sections, packets and messages."""
