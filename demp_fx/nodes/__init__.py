"""What inserted nodes run: noise, penalty, watch. Identities, all of them; they know nobody."""
