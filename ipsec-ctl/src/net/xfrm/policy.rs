//! A policy: what becomes of the packets that match a selector.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::Emitable;
use netlink_packet_xfrm::{
    Address, IPPROTO_ESP, Selector as WireSelector, UserPolicyId, UserPolicyInfo, UserTemplate,
    XFRM_POLICY_ALLOW, XFRM_POLICY_BLOCK, XFRM_POLICY_FWD, XFRM_POLICY_IN, XFRM_POLICY_OUT,
    XfrmAttrs, XfrmMessage,
    policy::{DelGetMessage, ModifyMessage},
};

use super::state::{Mode, OnCard, ip};

/// Which packets a policy is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyDirection {
    /// Those that come for this host.
    In,
    /// Those that leave.
    Out,
    /// Those that are forwarded.
    Forward,
}

impl PolicyDirection {
    fn number(self) -> u8 {
        match self {
            Self::In => XFRM_POLICY_IN,
            Self::Out => XFRM_POLICY_OUT,
            Self::Forward => XFRM_POLICY_FWD,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::In, Self::Out, Self::Forward]
            .into_iter()
            .find(|direction| direction.number() == number)
    }
}

/// Ports that are the same under a mask; mask 0 is any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortMask {
    /// Port in host byte order.
    pub port: u16,
    /// Which of its bits count.
    pub mask: u16,
}

/// Packets as the kernel can tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// Sources.
    pub source: IpNet,
    /// Destinations, of the same family.
    pub destination: IpNet,
    /// IP protocol; 0 is any.
    pub protocol: u8,
    /// Source ports; for ICMP the type.
    pub source_port: PortMask,
    /// Destination ports; for ICMP the code.
    pub destination_port: PortMask,
}

/// The SA that a packet must have come in, or is to leave in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Template {
    /// Outer source; unspecified is any.
    pub source: IpAddr,
    /// Outer destination; unspecified is any.
    pub destination: IpAddr,
    /// SPI; 0 is any.
    pub spi: u32,
    /// What the state must have.
    pub reqid: u32,
    /// How the state carries packets.
    pub mode: Mode,
}

/// What becomes of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// They are dropped.
    Block,
    /// They pass as they are.
    Pass,
    /// They pass in this SA only.
    Protect(Template),
}

/// A policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Policy {
    /// Which packets are asked about.
    pub direction: PolicyDirection,
    /// Which of them match.
    pub selector: Selector,
    /// Lower numbers are asked first.
    pub priority: u32,
    /// Of the xfrm interface that it belongs to; 0 is none.
    pub if_id: u32,
    /// What becomes of them.
    pub action: Action,
    /// Index of the interface whose card is to look after it as well.
    pub card: Option<u32>,
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Selector {
            source,
            destination,
            ..
        } = self.selector;
        write!(f, "{:?} {source} to {destination}", self.direction)
    }
}

impl Template {
    /// A template for whatever outer addresses.
    pub fn anywhere(v6: bool, reqid: u32) -> Self {
        let any = if v6 {
            Ipv6Addr::UNSPECIFIED.into()
        } else {
            Ipv4Addr::UNSPECIFIED.into()
        };
        Self {
            source: any,
            destination: any,
            spi: 0,
            reqid,
            mode: Mode::Tunnel,
        }
    }

    fn message(&self) -> UserTemplate {
        let mut template = UserTemplate {
            reqid: self.reqid,
            mode: self.mode.number(),
            ..UserTemplate::default()
        };
        template.source(&self.source);
        template.destination(&self.destination);
        template.spi(self.spi);
        template.protocol(IPPROTO_ESP);
        template
    }

    fn of(template: &UserTemplate) -> Option<Self> {
        (template.id.proto == IPPROTO_ESP).then_some(())?;
        Some(Self {
            source: ip(template.family, &template.saddr)?,
            destination: ip(template.family, &template.id.daddr)?,
            spi: template.id.spi,
            reqid: template.reqid,
            mode: Mode::of(template.mode)?,
        })
    }
}

impl Selector {
    /// All packets of a family.
    pub fn everything(v6: bool) -> Self {
        let net = if v6 {
            Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into()
        } else {
            Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into()
        };
        Self {
            source: net,
            destination: net,
            protocol: 0,
            source_port: PortMask::default(),
            destination_port: PortMask::default(),
        }
    }

    pub(super) fn message(&self) -> WireSelector {
        let mut selector = WireSelector {
            sport: self.source_port.port,
            sport_mask: self.source_port.mask,
            dport: self.destination_port.port,
            dport_mask: self.destination_port.mask,
            proto: self.protocol,
            ..WireSelector::default()
        };
        selector.source_prefix(&self.source.network(), self.source.prefix_len());
        selector.destination_prefix(&self.destination.network(), self.destination.prefix_len());
        // The setters take an unspecified address for the whole family.
        selector.prefixlen_s = self.source.prefix_len();
        selector.prefixlen_d = self.destination.prefix_len();
        selector
    }

    pub(super) fn of(selector: &WireSelector) -> Option<Self> {
        let net =
            |address: &Address, length| IpNet::new(ip(selector.family, address)?, length).ok();
        Some(Self {
            source: net(&selector.saddr, selector.prefixlen_s)?,
            destination: net(&selector.daddr, selector.prefixlen_d)?,
            protocol: selector.proto,
            source_port: PortMask {
                port: selector.sport,
                mask: selector.sport_mask,
            },
            destination_port: PortMask {
                port: selector.dport,
                mask: selector.dport_mask,
            },
        })
    }
}

/// What a socket is told (`IP_XFRM_POLICY`, `IPV6_XFRM_POLICY`) so that no policy of the whole host is asked about its packets
/// of a direction.
pub fn socket_pass(v6: bool, direction: PolicyDirection) -> Vec<u8> {
    let policy = Policy {
        direction,
        selector: Selector::everything(v6),
        priority: 0,
        if_id: 0,
        action: Action::Pass,
        card: None,
    };
    let info = policy.message().user_policy_info;
    let mut bytes = vec![0; info.buffer_len()];
    info.emit(&mut bytes);
    bytes
}

impl Policy {
    /// What tells it apart from others of its interface in the kernel.
    pub fn key(&self) -> (PolicyDirection, Selector) {
        (self.direction, self.selector)
    }

    pub(super) fn message(&self) -> ModifyMessage {
        let (action, template) = match &self.action {
            Action::Block => (XFRM_POLICY_BLOCK, None),
            Action::Pass => (XFRM_POLICY_ALLOW, None),
            Action::Protect(template) => (XFRM_POLICY_ALLOW, Some(template.message())),
        };
        let mut nlas: Vec<_> = template
            .map(|template| XfrmAttrs::Template(vec![template]))
            .into_iter()
            .collect();
        nlas.extend(self.interface());
        nlas.extend(self.card.map(|device| {
            let card = OnCard {
                device,
                inbound: false,
                packet: true,
            };
            card.attribute()
        }));
        ModifyMessage {
            user_policy_info: UserPolicyInfo {
                selector: self.selector.message(),
                priority: self.priority,
                direction: self.direction.number(),
                action,
                ..UserPolicyInfo::default()
            },
            nlas,
        }
    }

    pub(super) fn id_message(&self) -> DelGetMessage {
        DelGetMessage {
            user_policy_id: UserPolicyId {
                selector: self.selector.message(),
                index: 0,
                direction: self.direction.number(),
            },
            nlas: self.interface().into_iter().collect(),
        }
    }

    fn interface(&self) -> Option<XfrmAttrs> {
        (self.if_id != 0).then_some(XfrmAttrs::IfId(self.if_id))
    }

    /// A policy that the kernel tells of; none if it is one that we could not have set.
    pub(super) fn of(message: &XfrmMessage) -> Option<Self> {
        match message {
            XfrmMessage::AddPolicy(policy) | XfrmMessage::UpdatePolicy(policy) => {
                Self::with(&policy.user_policy_info, &policy.nlas)
            }
            _ => None,
        }
    }

    /// The policy that a notification says is gone; none if it is one that we could not have set.
    pub(super) fn removed(message: &DelGetMessage) -> Option<Self> {
        let info = message.nlas.iter().find_map(|attribute| match attribute {
            XfrmAttrs::PolicyInfo(info) => Some(info),
            _ => None,
        })?;
        Self::with(info, &message.nlas)
    }

    fn with(info: &UserPolicyInfo, attributes: &[XfrmAttrs]) -> Option<Self> {
        let (mut if_id, mut card, mut templates) = (0, None, &[] as &[UserTemplate]);
        for attribute in attributes {
            match attribute {
                XfrmAttrs::IfId(number) => if_id = *number,
                XfrmAttrs::Template(list) => templates = list,
                XfrmAttrs::OffloadDevice(device) => card = OnCard::of(device),
                _ => {}
            }
        }
        Some(Self {
            direction: PolicyDirection::of(info.direction)?,
            selector: Selector::of(&info.selector)?,
            priority: info.priority,
            if_id,
            action: match (info.action, templates) {
                (XFRM_POLICY_BLOCK, _) => Action::Block,
                (XFRM_POLICY_ALLOW, []) => Action::Pass,
                (XFRM_POLICY_ALLOW, [template]) => Action::Protect(Template::of(template)?),
                _ => return None,
            },
            card: card.map(|card| card.device),
        })
    }
}
