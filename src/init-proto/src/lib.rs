//! What moxlet-init and the agent say to each other, versioned.
