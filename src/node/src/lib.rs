//! A kubelet for a cluster of hosts: registration, pod workers, status, kubelet API.
