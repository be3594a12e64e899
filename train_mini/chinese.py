"""Chinese names of everything that the miniature knows, and the sentences around them.

The models' community writes Chinese, so the miniature reads it too.
"""

from .things import THINGS

# In the order of `THINGS`; alternatives are parted by a slash.
_NAMES = """
狐狸 狮子 老虎 熊 熊猫 考拉 猫 狗 兔子 老鼠 仓鼠 猪 牛/奶牛 马 独角兽 斑马 长颈鹿 大象 犀牛 河马 猴子 大猩猩
青蛙 狼 浣熊 刺猬 袋鼠 骆驼 羊驼 树懒 蝙蝠 猫头鹰 企鹅 鸭子 天鹅 火烈鸟 鹦鹉 孔雀 公鸡 小鸡 乌龟 鳄鱼 蛇 蜥蜴
恐龙 龙 鲸鱼 海豚 鱼/热带鱼 鲨鱼 章鱼 螃蟹 龙虾 蜗牛 蝴蝶 蜜蜂 瓢虫 蚂蚁 蜘蛛 向日葵 玫瑰 郁金香 仙人掌 棕榈树
松树 四叶草 枫叶 蘑菇 太阳 月亮 星星 彩虹 云 雪花 雪人 火/火焰 火山 苹果 青苹果 梨 橙子/橘子 柠檬 香蕉 西瓜
葡萄 草莓 樱桃 桃子 菠萝 椰子 猕猴桃 牛油果 番茄/西红柿 茄子 胡萝卜 玉米 辣椒 西兰花 大蒜 洋葱 牛角面包
椒盐卷饼 奶酪 汉堡/汉堡包 薯条 披萨 热狗 墨西哥卷饼 虾 冰淇淋 甜甜圈 饼干 蛋糕/生日蛋糕 纸杯蛋糕 棒棒糖 糖果
巧克力 爆米花 咖啡 茶壶 葡萄酒 啤酒 汽车/小汽车 出租车 公交车/公共汽车 警车 救护车 消防车 卡车 拖拉机 赛车
摩托车 踏板车 自行车 火车 电车 飞机 直升机 火箭 飞碟 帆船 轮船 锚 房子 城堡 教堂 帐篷 摩天轮 雨伞 气球 风筝
泰迪熊 机器人 幽灵 外星怪物 南瓜 圣诞树 礼物 皇冠 礼帽 钻石 戒指 钥匙 铃铛 灯泡 蜡烛 闹钟 锤子 斧头 磁铁 剪刀
铅笔 书 相机 电话 电视 吉他 小号 小提琴 鼓 奖杯 足球 篮球 网球拍 爱心 t恤 运动鞋 眼镜 骷髅 背包 椅子 沙漏
"""
THING_NAMES: dict[str, tuple[str, ...]] = {
    thing: tuple(names.split("/")) for thing, names in zip(THINGS, _NAMES.split(), strict=True)
}
COLOUR_NAMES: dict[str, tuple[str, ...]] = {
    "white": ("白色",), "black": ("黑色",), "gray": ("灰色",), "red": ("红色",), "yellow": ("黄色",),
    "green": ("绿色",), "blue": ("蓝色",), "pink": ("粉色", "粉红色"), "orange": ("橙色",), "purple": ("紫色",),
    "brown": ("棕色", "褐色"), "turquoise": ("青色", "青绿色"),
}  # fmt: skip
SIZE_NAMES = {
    "large": ("大", "巨大的", "很大的"),
    "medium": ("中等大小的", "中等的"),
    "small": ("小", "很小的", "小小的"),
}
WAY_NAMES = {"mirrored": ("左右翻转", "水平翻转", "镜像")}
PLACE_NAMES: dict[str, tuple[str, ...]] = {
    "centre": ("中间", "正中间", "中央"),
    "left": ("左边", "左侧"),
    "right": ("右边", "右侧"),
    "top": ("上方", "顶部", "上面"),
    "bottom": ("下方", "底部", "下面"),
    "top left": ("左上角", "左上方"),
    "top right": ("右上角", "右上方"),
    "bottom left": ("左下角", "左下方"),
    "bottom right": ("右下角", "右下方"),
}
COUNTS = {"two": ("两个", "两只"), "three": ("三个", "三只"), "four": ("四个", "四只")}
ONE = ("", "", "一只", "一个")

# {x}: the subject, {p}: the place, {b}: the background. Evaluation has sentences of its own.
TEMPLATES_FULL = (
    "{b}背景上的{x}",
    "{x}，{b}背景",
    "{b}背景，{x}",
    "{x}，{b}的背景",
    "一张{x}的图片，{b}背景",
    "画{x}，背景是{b}",
    "生成{x}，背景为{b}",
    "我想要{x}，{b}的背景",
    "帮我画{x}，要{b}背景",
    "{b}的背景，上面是{x}",
)
TEMPLATES_PLACE = (
    "{p}的{x}，{b}背景",
    "{x}在{p}，{b}背景",
    "{b}背景，{x}在{p}",
    "{b}背景上，{p}有{x}",
    "画面{p}是{x}，背景是{b}",
    "生成{x}，放在{p}，背景为{b}",
    "帮我画{x}，它在{p}，要{b}背景",
    "我想要{b}的背景，{p}放{x}",
)
TEMPLATES_NO_BACKGROUND = ("{x}", "一张{x}的图片", "画{x}", "生成{x}", "帮我画{x}", "我想要{x}")
TEMPLATES_PLACE_ONLY = ("{p}的{x}", "{x}在{p}", "画面{p}有{x}", "生成{x}，放在{p}", "帮我画{x}，它在{p}")
TEMPLATES_NO_THING = ("{b}背景", "{b}的背景")
TESTS_FULL = ("请画{x}，用{b}背景", "{b}背景的{x}")
TESTS_PLACE = ("请把{x}画在{p}，用{b}背景", "{b}背景的图片，{x}在{p}")
BESIDE = ("{1}和{2}并排", "{1}在{2}左边", "{1}在{2}的左侧")
BESIDE_TURNED = ("{2}在{1}右边", "{2}在{1}的右侧")
ABOVE = ("{1}在{2}上面", "{1}在{2}上方", "{1}在{2}的上面")
ABOVE_TURNED = ("{2}在{1}下面", "{2}在{1}下方")
AND = ("{1}和{2}", "{1}与{2}", "{1}、{2}")
