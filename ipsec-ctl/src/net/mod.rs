//! What the kernel knows: links, addresses, routes, rules, neighbours, sysctls, netfilter; and TUN devices.
