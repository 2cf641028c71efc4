"""Find files by pattern, bring them to this disk, and walk archives that nobody vouches for."""
