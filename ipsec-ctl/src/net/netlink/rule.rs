//! Rules: which table is asked for which packet.

use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    IpProtocol,
    route::RouteProtocol,
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::IpVersion;

use super::{Netlink, NetlinkError, ORIGIN};

/// A rule of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its place; lower ones are asked first.
    pub priority: u32,
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// Packets from there.
    pub from: Option<IpNet>,
    /// Packets to there.
    pub to: Option<IpNet>,
    /// Packets with this mark.
    pub mark: Option<u32>,
    /// Packets that this host sends itself, and the way back of those that arrive for it (`rp_filter`).
    pub local: bool,
    /// Packets of a service. The kernel looks for it in packets whose way back it checks only where there is such a rule that
    /// is not `local`.
    pub service: Option<Service>,
    /// The table that is asked.
    pub table: u32,
    /// Answers with a prefix of at most this length do not count.
    pub suppress: Option<u32>,
}

/// What a rule may be about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// From this UDP port.
    Udp(u16),
    /// ESP.
    Esp,
}

impl Netlink {
    /// Adds a rule; it may be there already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn add_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let mut request = self
            .handle
            .rule()
            .add()
            .action(RuleAction::ToTable)
            .table_id(rule.table)
            .priority(rule.priority);
        *request.message_mut() = rule_message(rule);
        let added = request.execute().await.map_err(|error| {
            NetlinkError::new(format!("add rule with priority {}", rule.priority), &error)
        });
        match added {
            Err(error) if error.is(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Removes a rule; it may be gone already.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn remove_rule(&self, rule: &Rule) -> Result<(), NetlinkError> {
        let removed = self
            .handle
            .rule()
            .del(rule_message(rule))
            .execute()
            .await
            .map_err(|error| {
                NetlinkError::new(
                    format!("remove rule with priority {}", rule.priority),
                    &error,
                )
            });
        match removed {
            Err(error) if error.is(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// The rules that are ours.
    ///
    /// # Errors
    ///
    /// [`NetlinkError`].
    pub async fn our_rules(&self) -> Result<Vec<Rule>, NetlinkError> {
        let mut ours = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let rules: Vec<RuleMessage> = self
                .handle
                .rule()
                .get(version)
                .execute()
                .try_collect()
                .await
                .map_err(|error| NetlinkError::new("list rules", &error))?;
            ours.extend(rules.iter().filter_map(rule_of));
        }
        Ok(ours)
    }
}

/// Where packets that this host sends itself come in, in the words of rules.
const LOOPBACK: &str = "lo";

fn rule_message(rule: &Rule) -> RuleMessage {
    use netlink_packet_route::AddressFamily;
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    message.header.action = RuleAction::ToTable;
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Table(rule.table));
    attributes.push(RuleAttribute::Protocol(RouteProtocol::from(ORIGIN)));
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
    }
    if rule.local {
        // A check of the way back asks as if the packet were the answer.
        attributes.push(RuleAttribute::Iifname(LOOPBACK.to_owned()));
    }
    if let Some(service) = rule.service {
        match service {
            Service::Udp(port) => attributes.extend([
                RuleAttribute::IpProtocol(IpProtocol::Udp),
                RuleAttribute::SourcePortRange(RulePortRange {
                    start: port,
                    end: port,
                }),
            ]),
            Service::Esp => attributes.push(RuleAttribute::IpProtocol(IpProtocol::Esp)),
        }
    }
    if let Some(length) = rule.suppress {
        attributes.push(RuleAttribute::SuppressPrefixLen(length));
    }
    if let Some(from) = rule.from {
        attributes.push(RuleAttribute::Source(from.network()));
        message.header.src_len = from.prefix_len();
    }
    if let Some(to) = rule.to {
        attributes.push(RuleAttribute::Destination(to.network()));
        message.header.dst_len = to.prefix_len();
    }
    message
}

fn rule_of(message: &RuleMessage) -> Option<Rule> {
    use netlink_packet_route::AddressFamily;
    let mut rule = Rule {
        priority: 0,
        v6: message.header.family == AddressFamily::Inet6,
        from: None,
        to: None,
        mark: None,
        local: false,
        service: None,
        table: u32::from(message.header.table),
        suppress: None,
    };
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => rule.priority = *number,
            RuleAttribute::Table(number) => rule.table = *number,
            RuleAttribute::FwMark(mark) => rule.mark = Some(*mark),
            RuleAttribute::Iifname(name) => rule.local = name == LOOPBACK,
            RuleAttribute::IpProtocol(IpProtocol::Esp) => rule.service = Some(Service::Esp),
            RuleAttribute::SourcePortRange(range) => rule.service = Some(Service::Udp(range.start)),
            RuleAttribute::SuppressPrefixLen(length) if *length != u32::MAX => {
                rule.suppress = Some(*length);
            }
            RuleAttribute::Source(address) => {
                rule.from = IpNet::new(*address, message.header.src_len).ok();
            }
            RuleAttribute::Destination(address) => {
                rule.to = IpNet::new(*address, message.header.dst_len).ok();
            }
            RuleAttribute::Protocol(protocol) => ours = *protocol == RouteProtocol::from(ORIGIN),
            _ => {}
        }
    }
    ours.then_some(rule)
}
