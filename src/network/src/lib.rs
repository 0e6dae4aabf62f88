//! How a pod is attached: CNI invocation and the files of its resolver and hosts.
