//! The CT of a pod: the engine contract, plain LXC, cgroups of its containers.
